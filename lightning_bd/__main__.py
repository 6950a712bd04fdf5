"""``python -m lightning_bd``."""

from lightning_bd.cli import main

if __name__ == "__main__":
    main()
