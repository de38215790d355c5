"""What the rows say to readers: tables, figures, and pages filled with them."""
