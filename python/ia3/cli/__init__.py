"""The command line: `app.py` puts the commands together, each of which is a module of its own."""
