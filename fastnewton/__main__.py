"""`python -m fastnewton` prints the configuration."""

from fastnewton.config import show_config

show_config()
