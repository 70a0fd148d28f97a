"""Where things run: the controller (the DAPO step), the Ray job and its workers. The only package that imports Ray."""
