"""``python -m hookengine``: the command ``hookengine``."""

from hookengine.cli import app

if __name__ == "__main__":
    app()
