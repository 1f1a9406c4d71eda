"""What every room needs and no room owns: files, text of others, the terminal, signals."""
