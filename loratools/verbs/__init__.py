"""One file a verb. Nothing is re-exported here, so that no submodule can shadow a function of the package."""
