"""python -m tests.zoo: which rule catches which scorer."""

from tests.zoo import CHEATS, HONEST, UNSEEN, zoo_table


def main() -> None:
    print(zoo_table([*HONEST, *CHEATS, *UNSEEN]))
    print(
        f"\n. ok   x FAIL   ? cannot tell   [x] the rule that the scorer breaks\n{len(HONEST)} honest scorers, "
        f"{len(CHEATS)} that cheat, {len(UNSEEN)} that no run can tell from an honest one"
    )


if __name__ == "__main__":
    main()
