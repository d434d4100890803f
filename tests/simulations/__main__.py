"""`python -m tests.simulations`: how long callers wait under four policies, on the same arrivals."""

from .comparison import FLEETS, HEAD, SERVICES, table


def main() -> None:
    """The table of docs/explanation/placement.md."""
    print(*HEAD, sep="\n")
    for fleet in FLEETS:
        for service in SERVICES:
            print(*table(fleet, service), sep="\n")


if __name__ == "__main__":
    main()
