// Describes a kernel's parameters; build.py appends a description of every kernel to the source.
#pragma once
#include "scheduler.h"

namespace cudasim {

template <class T>
constexpr char kind_of() {
  if (__is_same(T, bool)) return 'b';
  if (__is_same(T, float) || __is_same(T, double)) return 'f';
  if (__is_class(T)) return 'V';
  if constexpr (!__is_class(T)) return static_cast<T>(-1) < static_cast<T>(0) ? 'i' : 'u';
}

template <class T>
struct TypeOf {
  static constexpr Type value = {kind_of<T>(), sizeof(T)};
};
template <class T>
struct TypeOf<T*> {
  static constexpr Type value = {'p', sizeof(T*)};
};

template <size_t...>
struct Indices {};
template <size_t count, size_t... indices>
struct UpTo : UpTo<count - 1, count - 1, indices...> {};
template <size_t... indices>
struct UpTo<0, indices...> {
  using type = Indices<indices...>;
};

template <auto function>
struct Described;
template <class... T, void (*function)(T...)>
struct Described<function> {
  static constexpr Type types[] = {TypeOf<T>::value..., {0, 0}};

  static void call(void** arguments) { call(arguments, typename UpTo<sizeof...(T)>::type{}); }

  template <size_t... i>
  static void call(void** arguments, Indices<i...>) {
    (void)arguments;  // of a kernel without parameters
    function(*static_cast<T*>(arguments[i])...);
  }
};

}  // namespace cudasim
