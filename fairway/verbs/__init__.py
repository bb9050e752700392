"""One module a verb of the command `fairway`; fairway/cli.py lists them."""
