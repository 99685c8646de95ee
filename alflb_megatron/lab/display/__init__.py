"""What several rooms show things with: `plot_style` (colours, axes, PNG files) and `text` (tables, counts)."""
