"""OCI images and guest images, made into bootable files."""
