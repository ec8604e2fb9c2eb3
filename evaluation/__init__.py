"""The paper's experiments as commands: images by the thousand, their metrics, and the page that tells them."""
