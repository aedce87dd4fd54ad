"""Results, tables, plots and published figures. Nothing here needs torch: reports read files."""
