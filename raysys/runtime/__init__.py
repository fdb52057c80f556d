"""What every job needs and no paper names."""
