"""The type of a configuration."""

from typing import Any

#: An `ml_collections.ConfigDict`, whose fields a type checker cannot know.
Config = Any
