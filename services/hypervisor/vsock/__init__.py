"""A virtio-vsock device in its own process: vhost-user backend, split queues, streams.

Imports nothing of the services, so that the process that runs it starts fast and can be confined.
"""
