"""Print which rule catches which scorer: python -m tests.zoo."""

from tests.zoo import CHEATS, HONEST, UNSEEN, zoo_table


def main() -> None:
    print(zoo_table([*HONEST, *CHEATS, *UNSEEN]))
    print(
        "\n. ok   x FAIL   ? cannot tell   [x] the rule that the scorer breaks\n"
        f"{len(HONEST)} honest scorers, {len(CHEATS)} that cheat, {len(UNSEEN)} that no run can "
        "tell from an honest one"
    )


if __name__ == "__main__":
    main()
