"""`python -m ldt_schedules` is `ldt`."""

from ldt_schedules.cli.app import main

if __name__ == "__main__":
    main()
