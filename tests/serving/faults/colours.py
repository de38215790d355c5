"""First pixels of pictures at which something goes wrong."""

RAISE, DIE, SLOW = (13, 37, 99), (66, 6, 66), (5, 50, 5)
