"""``python -m core2_sampler`` is the command ``core2``."""

from core2_sampler.cli import main

if __name__ == "__main__":
    main()
