"""What several rooms draw with: `plots` (colours, axes, the picture that compares runs) and `text_table`."""
