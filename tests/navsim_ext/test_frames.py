"""Laws of SE(2): round trips, composition, wrapping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from navsim_ext.frames import quaternion_to_heading, rotate, to_global, to_local, wrap_angle

coordinate = st.floats(-1e6, 1e6)
angle = st.floats(-np.pi, np.pi, exclude_max=True)
pose = st.tuples(coordinate, coordinate, angle).map(np.array)


@given(st.floats(-1e4, 1e4))
def test_wrap_angle_is_in_range_and_congruent(value):
    wrapped = float(wrap_angle(value))
    assert -np.pi <= wrapped < np.pi
    assert np.isclose((wrapped - value) / (2 * np.pi), round((wrapped - value) / (2 * np.pi)), atol=1e-9)


@given(pose, pose)
def test_to_local_inverts_to_global(local, origin):
    back = to_local(to_global(local, origin), origin)
    np.testing.assert_allclose(back[:2], local[:2], atol=1e-8)
    assert abs(float(wrap_angle(back[2] - local[2]))) < 1e-9


@given(pose, pose, pose)
def test_composition_is_associative(a, b, c):
    left, right = to_global(to_global(a, b), c), to_global(a, to_global(b, c))
    np.testing.assert_allclose(left[:2], right[:2], atol=1e-7)
    assert abs(float(wrap_angle(left[2] - right[2]))) < 1e-9


def test_rotation_is_counter_clockwise():
    np.testing.assert_allclose(rotate([1.0, 0.0], np.pi / 2), [0.0, 1.0], atol=1e-15)


@pytest.mark.parametrize("heading", [-3.0, -1.0, 0.0, 0.5, 3.1])
def test_quaternion_about_z_gives_its_heading(heading):
    quaternion = [np.cos(heading / 2), 0.0, 0.0, np.sin(heading / 2)]
    assert np.isclose(quaternion_to_heading(quaternion), heading)
