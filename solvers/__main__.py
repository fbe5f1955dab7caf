"""`python -m solvers`, and what the console script `solvers` calls."""

import sys


def main() -> None:
    """Run the command; without its optional packages, one line that says what to install."""
    try:
        from solvers.cli import app
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "matplotlib"):
            raise
        sys.exit(f"solvers: the command needs {error.name}: pip install 'diffusion-solvers[cli]'")
    app(prog_name="solvers")


if __name__ == "__main__":
    main()
