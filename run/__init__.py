"""Which run a command is about: its flags, its name, its record."""
