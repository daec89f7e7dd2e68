"""`python -m glowplug`: the same as the command `glowplug`."""

from glowplug.cli import main

if __name__ == "__main__":
    main()
