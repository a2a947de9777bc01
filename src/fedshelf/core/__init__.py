"""Pure types that the other packages build on. Imports only torch and the standard library."""
