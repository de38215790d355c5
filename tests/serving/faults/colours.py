"""First pixels of pictures at which something goes wrong."""

RAISE, BREAK, DIE, SLOW = (13, 37, 99), (99, 37, 13), (66, 6, 66), (5, 50, 5)
