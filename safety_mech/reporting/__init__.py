"""What a run leaves behind: its folder, tables, plots and one HTML page.

This room may import from every room but `commands`.
"""
