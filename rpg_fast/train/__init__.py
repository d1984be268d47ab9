"""The training program: `rpg-fast train` and `rpg-fast evaluate`."""
