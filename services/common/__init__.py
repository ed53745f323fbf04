"""Host code shared by the services and the client."""
