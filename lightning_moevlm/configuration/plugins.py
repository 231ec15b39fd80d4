"""Loads parts that other packages offer under the entry-point group `lightning_moevlm.plugins`."""

from importlib.metadata import entry_points

PLUGIN_GROUP = "lightning_moevlm.plugins"


def load_plugins() -> None:
    """Import the modules of the entry-point group, so that their parts have short names here."""
    for entry in entry_points(group=PLUGIN_GROUP):
        entry.load()
