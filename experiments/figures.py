"""Figures need matplotlib, an extra: without it a program writes everything else."""

from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files; None, and one printed sentence, if it is not there."""
    try:
        import matplotlib  # slow to import
    except ImportError:
        print("matplotlib is not installed: no figure (pip install 'jaxcomm[plots]').")
        return None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
