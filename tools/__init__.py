"""What makes or proves what the package ships; none of it is packaged."""
