"""Networks side by side: contestants in turns, their rows, and the files of these."""
