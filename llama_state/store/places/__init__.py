"""The places that objects of a store can lie in: memory, folders, servers, object stores."""
