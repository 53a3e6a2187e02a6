"""What people look at: pages, charts, image grids."""
