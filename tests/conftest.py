"""Eight CPU devices for every test, before JAX starts."""

import os

import jax

if not os.environ.get("JAXCOMM_TEST_PLATFORM"):  # set it to run the suite on an accelerator
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
