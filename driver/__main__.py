"""`python -m driver` is the `knd` command."""

from driver.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
