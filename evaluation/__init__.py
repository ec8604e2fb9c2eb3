"""What measures images: they are made by the thousand, measured, and told on a page."""
