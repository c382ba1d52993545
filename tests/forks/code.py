"""``python -m tests.forks.code CODE WORD...`` is ``python -c CODE WORD...``, which a fork can be as well."""

import sys
from typing import Any


def main() -> None:
    _, code, *words = sys.argv
    sys.argv = ["-c", *words]
    namespace: dict[str, Any] = vars(sys.modules["__main__"])
    exec(compile(code, "<string>", "exec"), namespace)


if __name__ == "__main__":
    main()
