"""The command that makes an API key: python -m serve.keys NAME"""

from __future__ import annotations

import argparse
import sys

from serve.gateway import keys


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve.keys", description=keys.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", help="who will use it, e.g. team-a")
    name = parser.parse_args().name
    if not keys.NAME.fullmatch(name):
        sys.exit(f"A name holds letters, digits, '.', '_' and '-', but {name!r} was given.")
    key, line = keys.make_key(name)
    print(f"The key, shown only now; give it to its user:\n\n    {key}\n")
    print(f"Its line, for the keys file:\n\n    {line}")


if __name__ == "__main__":
    main()
