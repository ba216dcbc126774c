"""What can stand in the place of one of the top level's parts: each file here is copied alone."""

import lab  # noqa: F401  how a waiting thread behaves is set before torch is imported
