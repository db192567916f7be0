"""Recipe cache_teacher."""
