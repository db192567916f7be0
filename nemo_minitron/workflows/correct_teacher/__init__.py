"""Recipe correct_teacher."""
