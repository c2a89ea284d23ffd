"""Meeting points with other libraries; importing this package does nothing."""
