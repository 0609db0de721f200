"""The one error type of the package, and the one form that its messages have."""


class Qwen35Error(ValueError):
    """Bad input, stated so that the reader can act: what is wrong, where, expected, found, and what to do.

    >>> raise Qwen35Error("tensor has the wrong shape", where="model-00001.safetensors: norm.weight",
    ...                   expected="[2048]", found="[1024]", do="check that the shard belongs to this config.json")
    """

    def __init__(self, what: str, *, where: object = "", expected: object = "", found: object = "", do: str = ""):
        self.what, self.where, self.expected, self.found, self.do = what, where, expected, found, do
        parts = [what]
        for label, value in (("where", where), ("expected", expected), ("found", found), ("do", do)):
            if str(value):
                parts.append(f"  {label}: {value}")
        super().__init__("\n".join(parts))
