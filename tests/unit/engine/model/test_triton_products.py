"""Which tile a product is computed in."""

from engine.model.triton_products import MIN_TILES, SHAPES, num_tiles, shape_of


def test_the_largest_tile_of_which_there_are_enough_is_taken():
    large, medium, small = SHAPES
    assert shape_of(2048, 4096) == large
    assert shape_of(1, 28672) == large
    assert shape_of(128, 6144) == medium
    assert shape_of(1, 4096) == small
    assert shape_of(1, 64) == small  # never enough


def test_a_result_is_covered_to_its_last_row_and_column():
    assert num_tiles(1, 1, (64, 32)) == 1
    assert num_tiles(64, 32, (64, 32)) == 1
    assert num_tiles(65, 33, (64, 32)) == 4
    assert num_tiles(0, 33, (64, 32)) == 0
    assert num_tiles(128, 32 * MIN_TILES, (128, 32)) == MIN_TILES
