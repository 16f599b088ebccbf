"""``python -m components.prepare``."""

from components.prepare.commands import main

if __name__ == "__main__":
    main()
