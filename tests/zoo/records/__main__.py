"""Write every folder of the zoo, or print its table: python -m tests.zoo.records OUT | --table."""

import argparse
from pathlib import Path

from tests.zoo.records import BAD, GOOD, folder_name, good_files, table, write


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.zoo.records", description="Record folders with a fault each."
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "out", nargs="?", type=Path, metavar="OUT", help="write OUT/good/* and OUT/bad/*"
    )
    given.add_argument(
        "--table", action="store_true", help="print folder, fault and check for docs/LEGALITY.md"
    )
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    out = args.out
    for name in GOOD:
        write(good_files(name), out / "good" / name)
    for name, fault in BAD.items():
        write(fault.build(), out / "bad" / folder_name(name))
    print(f"{len(GOOD)} good folders in {out / 'good'}, {len(BAD)} bad ones in {out / 'bad'}")


if __name__ == "__main__":
    main()
