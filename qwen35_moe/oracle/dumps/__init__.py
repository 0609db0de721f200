"""From the files of an engine to rows of the tokens that the truth has.

readers/          files -> pieces (one tensor each, under the engine's name), and the tokens of each step
engine_names      the name of a piece -> its tap, and what its columns hold;  kinds: is the shared expert fused, which
                  steps are a draft head's
dump, ranks       the pieces of all ranks -> the rows of a tap in a step
runs, sequences   the tokens of a step -> one run a sequence -> the sequences of the dump
match, matched    runs -> which row is which token of the truth;  by_count: without ids;  draft_rows: of a draft head
align, pair       a tap of the dump and of the truth at the same tokens;  step_rows: all rows of the engine's steps
checks            dumps that look alright and are not;  writers: the truth in other programs' formats
"""
