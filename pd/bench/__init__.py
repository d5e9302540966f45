"""The measurements that the README quotes: `pd bench serve|engine|scheduler|transfer|router`."""
