"""May the shared expert be computed as one more routed expert? One rule for each engine; `decide` is the way in.

| word | here |
|---|---|
| fused | the shared expert lies in the tensor of the routed experts, as slot E behind experts 0 to E - 1 |
| body | the three projections of the shared expert, without its gate vector `shared_expert_gate` |
| merged module | a module that engines build of several stored ones: `gate_up_proj` of `gate_proj` and `up_proj` |
| target, draft | the model itself; its MTP head, whose layers are `mtp.layers.N` |
| canonical name | a module's name without the checkpoint's prefix: `layers.0.mlp.gate`, `mtp.layers.0.mlp.gate` |
| spec | the format of a module's weights, and of its inputs (`quant.precision.ModuleSpec`) |
| declared, stored | what a module is by the quantization_config; what it is by its bytes |
| exclude list, entry | the modules that a quantization_config leaves unquantised; one string of this list |
| reading | how an engine or a tool decides whether an entry names a module |
| rule | how one version of an engine decides whether to fuse, or how it should be decided (`strict`) |
"""
